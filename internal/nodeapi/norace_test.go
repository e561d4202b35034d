//go:build !race

package nodeapi

const raceDetector = false
