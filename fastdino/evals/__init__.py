"""The paper's evaluations, one file each."""
