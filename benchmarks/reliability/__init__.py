"""What bad inputs, long runs and interruptions do."""
