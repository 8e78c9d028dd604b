"""What nobody should have to pick by eye: step size, friction, localization, control variates."""
