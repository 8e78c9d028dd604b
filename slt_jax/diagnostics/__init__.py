"""Is an estimate to be believed? Numbers from the draws, and the verdict on them."""
