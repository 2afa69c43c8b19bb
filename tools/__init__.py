"""Commands beside the main ones: plots, a classifier, a linear probe, a table of speeds."""
