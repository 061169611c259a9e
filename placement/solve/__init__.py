"""The search for the best placement and its proof, and the questions that several searches answer."""
