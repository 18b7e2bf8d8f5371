"""What a recipe's train step needs of devices that are not there, compiled ahead of time."""
