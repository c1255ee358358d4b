"""θ' outside the process: as a PEFT adapter, as a whole model, as a state dict, and back."""
