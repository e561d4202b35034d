package remote

import (
	"context"
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"strings"
	"unicode/utf16"

	"golang.org/x/crypto/ssh"

	"keyfleet.dev/keyfleet/internal/fault"
	"keyfleet.dev/keyfleet/internal/rotation"
)

// Machines with Windows (OpenSSH for Windows, PowerShell 5.1).
//
// Idea: as on Linux, the command line that sshd sees is the same for every
// program, in words that mean the same to cmd.exe and to PowerShell, and the
// program comes on standard input. It comes as three lines, since PowerShell takes
// its standard input as lines:
//
//	length of the program
//	the program, in base64
//	"." and the input of the script, in base64
//
// The input stays apart from the program until it is a variable of it: Windows can
// be told to keep the text of each script in its event log, and keeps it unasked
// if it looks suspicious. A program begins only if it has arrived whole, and ends
// at once if its input has not.
//
// What is missing: a script that a lost connection does not end. Some versions of
// this sshd end what runs when the connection is lost, others do not, so a script
// that changes something holds a mutex of the machine and can be run again at any
// point. Time is kept by us and by the waits in the scripts.

// windowsLog is the log on machines with Windows.
const windowsLog = `c:\k\rotate-certs.log`

// windowsBootstrap takes the three lines. $input is how PowerShell hands standard
// input to the command that it was started with.
const windowsBootstrap = `$ErrorActionPreference = 'Stop'; $ProgressPreference = 'SilentlyContinue'
$lines = @($input)
if ($lines.Count -lt 3 -or $lines[1].Length -ne [int]$lines[0]) {
  [Console]::Error.WriteLine('keyfleet: the program did not arrive whole')
  exit 74
}
$sent = $lines[2].Substring(1)
. ([ScriptBlock]::Create([System.Text.Encoding]::UTF8.GetString([System.Convert]::FromBase64String($lines[1]))))
`

// windowsLine is the command line; cmd.exe takes 8191 characters.
func windowsLine() string {
	var text []byte
	for _, unit := range utf16.Encode([]rune(windowsBootstrap)) {
		text = binary.LittleEndian.AppendUint16(text, unit)
	}
	return "powershell.exe -NoProfile -NonInteractive -ExecutionPolicy Bypass -EncodedCommand " + base64.StdEncoding.EncodeToString(text)
}

// windowsMark prints the mark after which the output is ours.
func windowsMark(mark string) string {
	return fmt.Sprintf("[Console]::Out.Write('%s' + [char]10); [Console]::Error.Write('%s' + [char]10)\n", mark, mark)
}

// windowsValue is a text as an expression of PowerShell that no character can leave.
func windowsValue(s string) string {
	return "(ConvertFrom-Sent '" + base64.StdEncoding.EncodeToString([]byte(s)) + "')"
}

// windowsProgram is the program that runs a script and keeps the log.
func windowsProgram(s rotation.Script, log string) string {
	args := make([]string, len(s.Args))
	for i, a := range s.Args {
		args[i] = windowsValue(a)
	}
	quiet := map[bool]string{true: "$true", false: "$false"}[s.Quiet]
	var b strings.Builder
	b.WriteString(windowsHead)
	fmt.Fprintf(&b, "if ($sent.Length -ne %d) {\n  [Console]::Error.WriteLine('keyfleet: the input did not arrive whole')\n  exit 74\n}\n", base64.StdEncoding.EncodedLen(len(s.Input)))
	fmt.Fprintf(&b, "$name = %s\n$log = %s\n$quiet = %s\n", windowsValue(strings.Join(strings.Fields(s.Name), " ")), windowsValue(log), quiet)
	fmt.Fprintf(&b, "$argv = @(%s)\n$text = %s\n", strings.Join(args, ", "), windowsValue(s.Text))
	b.WriteString(windowsJob)
	return b.String()
}

const windowsHead = `$ErrorActionPreference = 'Stop'
$ProgressPreference = 'SilentlyContinue'
Set-StrictMode -Version 3
function ConvertFrom-Sent([string]$part) { return [System.Text.Encoding]::UTF8.GetString([System.Convert]::FromBase64String($part)) }
`

// The output goes to the log as it comes, and on to us.
const windowsJob = `$stdin = ConvertFrom-Sent $sent
function Write-Log([string]$line) {
  if (-not $quiet) { $line | Out-File -FilePath $log -Append -Encoding utf8 }
}
function Get-Stamp { return [DateTime]::UtcNow.ToString('yyyy-MM-ddTHH:mm:ssZ') }
$status = 0
$began = [DateTime]::UtcNow
$ours = $false
try {
  if (-not $quiet) {
    $mutex = [System.Threading.Mutex]::new($false, 'Global\keyfleet-rotate-certs')
    try { $ours = $mutex.WaitOne(60000) } catch {
      if ($_.Exception.GetBaseException() -isnot [System.Threading.AbandonedMutexException]) { throw }
      $ours = $true
    }
    if (-not $ours) { throw 'another step is still under way there' }
  }
  Write-Log ('=== ' + (Get-Stamp) + ' ' + $name)
  & ([ScriptBlock]::Create($text)) | ForEach-Object {
    Write-Log ([string]$_)
    [Console]::Out.Write([string]$_ + [char]10)
  }
} catch {
  $status = 1
  if ($_.Exception.Data.Contains('status')) { $status = [int]$_.Exception.Data['status'] }
  $why = $_.Exception.Message
  [Console]::Error.Write($why + [char]10)
  Write-Log $why
}
Write-Log ('=== ' + (Get-Stamp) + ' ' + $name + ': exit status ' + $status + ' after ' + [int][DateTime]::UtcNow.Subtract($began).TotalSeconds + ' s')
if ($ours) { $mutex.ReleaseMutex() }
exit $status
`

// runWindows is Run on a machine with Windows. A script that Finishes is run like any
// other there, and the error of a lost connection says so.
func (h *Host) runWindows(ctx context.Context, s rotation.Script) ([]byte, error) {
	input := base64.StdEncoding.EncodeToString(s.Input)
	program := windowsProgram(s, h.log)
	var out *outcome
	err := persist(ctx, trials, s.Quiet, func() (err error) {
		out, err = h.root(ctx, command{text: program, stdin: strings.NewReader("\n." + input + "\n"), wait: limitOf(s) + grace})
		return err
	})
	if err != nil {
		return nil, h.failed(s.Name, s.Quiet, err)
	}
	out.stdout = []byte(strings.ReplaceAll(string(out.stdout), "\r\n", "\n"))
	return h.result(s, out)
}

// auth is how we log in to a machine: everywhere with the key, and where it
// runs Windows with the password too, which aks-engine gives it.
func (j *Jump) auth(m machine) []ssh.AuthMethod {
	methods := []ssh.AuthMethod{ssh.PublicKeys(j.signer)}
	if m.windows && j.cfg.WindowsPassword != "" {
		methods = append(methods, ssh.Password(j.cfg.WindowsPassword))
	}
	return methods
}

// refusedLogin explains that a machine with Windows does not let us in.
func (j *Jump) refusedLogin(m machine, err error) error {
	how := "with this key"
	if j.cfg.WindowsPassword != "" {
		how = "with this key, nor with the password of the API model"
	}
	return fault.New(fault.Unauthenticated, "", "%s (%s) does not let %s in %s.", m.name, m.address, m.user, how).
		WithFix(`correct windowsProfile.adminUsername and adminPassword in the API model, or add the line %q to C:\ProgramData\ssh\administrators_authorized_keys there`,
			strings.TrimSpace(string(ssh.MarshalAuthorizedKey(j.signer.PublicKey())))).Because(err)
}

// didNotRunWindows explains why a program did not even begin.
func (l *link) didNotRunWindows(status int, stderr string) error {
	m := l.machine
	return fault.New(fault.Denied, "", "%s (%s) lets %s in but does not run PowerShell (exit status %d): %s", m.name, m.address, m.user, status, lastLines(stderr, 2)).
		WithFix("look whether powershell.exe 5.1 runs there, for that user, from the shell that sshd starts")
}
