"""The kinds of datasets that --data_path accepts."""
