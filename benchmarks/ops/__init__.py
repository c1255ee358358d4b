"""The passes of the ops: gates, times, compilation."""
