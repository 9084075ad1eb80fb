"""One offline page about a plan: timelines of its memory, what stands at the peak, its lines, its frontier."""
