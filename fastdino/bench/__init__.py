"""`fastdino bench`: how fast training is, beside what people use."""
