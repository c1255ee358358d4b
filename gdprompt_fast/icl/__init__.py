"""In-context learning against fine-tuning: how alike are they, in a model's own activations?"""
