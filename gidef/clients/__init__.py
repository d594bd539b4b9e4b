"""What happens on a client: local training and the state that stays there."""
