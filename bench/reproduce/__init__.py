"""The paper's claims by one command: training, evaluation, and a card of results for each network."""
