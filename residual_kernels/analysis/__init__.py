"""What do the heads know? The paper's analyses of units, their components and their learned weights."""
