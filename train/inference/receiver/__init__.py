"""Code that runs at the receiver of an export, without earshard; ``train/inference/flatten.py`` makes its files."""
