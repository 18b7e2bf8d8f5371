"""Plans a recipe's train step for absent devices, by compiling it ahead of time."""
