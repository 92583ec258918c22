"""Side by side with other ways to run many trainings."""
