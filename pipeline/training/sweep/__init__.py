"""Many settings of heads on the rows of one backbone or several, ranked on the validation split."""
