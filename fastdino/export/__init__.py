"""`fastdino export`: write a backbone in the format of another library."""
