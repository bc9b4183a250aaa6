"""What the stages that train networks share: readers, worker groups on Ray Train, checkpoints, epoch logs."""
