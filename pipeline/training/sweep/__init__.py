"""Try many settings of heads on the rows of one or several backbones, and rank them on the validation split."""
