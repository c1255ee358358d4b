"""What a run writes: files and folders whole or not there, and what may be written over."""
