"""What a figure shows, described once (`panel`), and two ways to draw it: `static` and `interactive`."""
