"""The frozen network: which networks there are, their weights, where they are cut, pixels → features."""
