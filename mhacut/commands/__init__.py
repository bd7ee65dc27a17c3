"""One module per command: options in, result out."""
