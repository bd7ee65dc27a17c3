"""Images reach the model as they are, or an error says which do not."""
