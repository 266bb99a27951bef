"""`fastdino export`: backbones in the formats of other libraries."""
