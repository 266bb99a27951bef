"""Dataset formats: what --data_path can name."""
