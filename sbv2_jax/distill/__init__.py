"""The method of SwiftBrush v2: losses, the step, and the state that it changes."""
