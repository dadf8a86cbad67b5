"""The server of local pages: the review of tuples and the blind vote. Who may ask, what is sent, how connections end."""
