"""What several test modules use: small models, plans for them, files, the command line in this process."""
