"""How the processes of a run start and find each other."""
