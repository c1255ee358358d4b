"""What the inner step means for each type of layer: one file per rule, and the attachment to a
model.
"""
