"""What a model is made of, in numbers: parameters, operations, shapes, terms."""
