"""One token at a time on a CPU, by a program that is compiled where it runs."""
