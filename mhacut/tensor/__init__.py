"""Pure tensor maths: tensors in, tensors out; torch and the standard library only."""
