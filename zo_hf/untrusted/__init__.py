"""Reading of files that somebody else may have written: nothing is trusted before it has been checked."""
