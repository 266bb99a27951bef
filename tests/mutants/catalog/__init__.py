"""The mutants: each module has MUTANTS, a tuple. A new hole in the tests is added here first."""
