"""Export the network of a run."""
