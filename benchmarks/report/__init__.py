"""Tables and figures, made from rows."""
