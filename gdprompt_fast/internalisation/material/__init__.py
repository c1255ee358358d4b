"""What is learnt and asked: subsets, people, triples, lists of numbers, digits, and their texts."""
