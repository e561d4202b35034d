// Package effect marks the outside effects of a process: a committed
// transaction, a renamed file, a started process, a sent report.
//
// Idea: "what happens if we die here" is only answerable if "here" can be
// enumerated. Every port that changes the world outside the process does it
// inside [Do], under a name. In a release build Do only calls its function. In
// a build with the tag "killpoints" it counts effects and, when told by
// environment variables, kills the process with SIGKILL before or after the
// n-th one, so a test can walk through all of them.
//
// Invariant: Do never changes what the function does, its result, or its order.
//
// Consequence for the operator: none in a release build; the environment
// variables are not read there.
package effect
