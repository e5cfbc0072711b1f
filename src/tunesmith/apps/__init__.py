"""What people touch: commands, terminal, pages. Only here is anything printed."""
