"""TrainConfig and a space -> the best TrainConfig."""
