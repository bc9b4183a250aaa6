"""The order of the stages: which are complete, which run, in which order. No science here."""
