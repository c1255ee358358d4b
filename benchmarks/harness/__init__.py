"""What every benchmark is measured with: rows, time and memory, processes of their own."""
