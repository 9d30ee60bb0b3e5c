from remend.cli import main

main()
