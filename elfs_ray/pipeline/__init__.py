"""Run the stages in order: plan what is complete and what must run, check it, run it. No science here."""
