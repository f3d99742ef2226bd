"""The network and the data of `secateur demo`. It trains and prunes in under a minute."""
