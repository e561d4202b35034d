package rotation

// The scripts that run on Windows workers: PowerShell 5.1, which Windows Server has
// had since 2016. Package remote runs them with ErrorActionPreference Stop and
// strict mode, and gives them $argv, an array, and $stdin, a text. What they leave
// in the pipeline is their output. RUN is as on Linux, with c:\k\config in
// RUN\old\c\k\config, and nobody but Administrators and SYSTEM gets into it.
//
// A secret is touched by methods of .NET only, never by a cmdlet: Windows can be
// told to log the arguments of each cmdlet, and the text of each script.

// psCommon begins every script.
const psCommon = `
function Stop-Step([int]$status, [string]$why) {
  $e = [System.Exception]::new($why)
  $e.Data['status'] = $status
  throw $e
}
function Test-File([string]$path) { return [System.IO.File]::Exists($path) }
function Get-Tree([string]$stage, [string]$path) {
  return [System.IO.Path]::Combine($RUN, $stage, $path.Replace(':', ''))
}
function Get-Parts([string]$item) {
  $i = $item.IndexOf(':')
  return @($item.Substring(0, $i), $item.Substring($i + 1))
}
function Get-Text([string]$path) {
  if (-not (Test-File $path)) { return '' }
  return [System.IO.File]::ReadAllText($path)
}
function Get-BytesHash([byte[]]$bytes) {
  $sha = [System.Security.Cryptography.SHA256]::Create()
  try { return [System.BitConverter]::ToString($sha.ComputeHash($bytes)).Replace('-', '') } finally { $sha.Dispose() }
}
`

// psWrite has what changes files. A new file gets the access list of the one that it
// will replace before it has content. Somebody may have the old one open for a moment.
const psWrite = psCommon + `
function New-Parent([string]$path) {
  [void][System.IO.Directory]::CreateDirectory([System.IO.Path]::GetDirectoryName($path))
}
function Move-Over([string]$new, [string]$path) {
  for ($i = 1; ; $i++) {
    try {
      if (Test-File $path) { [System.IO.File]::Replace($new, $path, [NullString]::Value, $false) }
      else { [System.IO.File]::Move($new, $path) }
      return
    } catch {
      if ($i -ge 20) { throw }
      Start-Sleep -Milliseconds 250
    }
  }
}
function Write-Whole([string]$path, [byte[]]$bytes) {
  $new = $path + '.keyfleet-new'
  if (Test-File $new) { [System.IO.File]::Delete($new) }
  [System.IO.File]::Create($new).Dispose()
  if (Test-File $path) {
    $access = [System.Security.AccessControl.AccessControlSections]::Access
    $acl = [System.Security.AccessControl.FileSecurity]::new()
    $acl.SetSecurityDescriptorSddlForm([System.IO.File]::GetAccessControl($path, $access).GetSecurityDescriptorSddlForm($access), $access)
    [System.IO.File]::SetAccessControl($new, $acl)
  }
  $stream = [System.IO.FileStream]::new($new, [System.IO.FileMode]::Open, [System.IO.FileAccess]::Write, [System.IO.FileShare]::None)
  try {
    $stream.Write($bytes, 0, $bytes.Length)
    $stream.Flush($true)
  } finally { $stream.Dispose() }
  if ((Get-FileHash -LiteralPath $new -Algorithm SHA256).Hash -ne (Get-BytesHash $bytes)) {
    [System.IO.File]::Delete($new)
    Stop-Step 1 ($path + ' was not written whole')
  }
  Move-Over $new $path
  [System.IO.File]::SetLastWriteTimeUtc($path, [DateTime]::UtcNow)
}
`

// psFence begins every script that changes something; see fence.
const psFence = psWrite + `
$RUN = $argv[0]
$TOKEN = $argv[1]
$items = @($argv | Select-Object -Skip 2)
function Assert-Holder {
  $holder = [System.IO.Path]::Combine($RUN, 'holder')
  if ((Get-Text $holder) -cne $TOKEN) { Stop-Step 75 'another runner has taken over this rotation' }
  [System.IO.File]::SetLastWriteTimeUtc($holder, [DateTime]::UtcNow)
}
Assert-Holder
`

// psLook is lookScript.
const psLook = psCommon + `
foreach ($item in $argv) {
  $how, $path = Get-Parts $item
  if (-not (Test-File $path)) { $path + '|-|||||||'; continue }
  $kind = 'f'
  $link = ''
  if ([System.IO.File]::GetAttributes($path).HasFlag([System.IO.FileAttributes]::ReparsePoint)) {
    $kind = 'l'
    $link = @((Get-Item -LiteralPath $path -Force).Target) -join ''
  }
  $bytes = [System.IO.File]::ReadAllBytes($path)
  $text = ''
  if ($how -eq 'cert') {
    $text = [regex]::Match([System.Text.Encoding]::ASCII.GetString($bytes), '(?s)-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----').Value + [char]10
  }
  if ($how -eq 'config') {
    $text = [regex]::Replace([System.IO.File]::ReadAllText($path), '(client-key-data|token|password):.*', '$1: ""')
  }
  $content = [System.Convert]::ToBase64String([System.Text.Encoding]::UTF8.GetBytes($text))
  if ($how -eq 'plain') { $content = [System.Convert]::ToBase64String($bytes) }
  $changed = [DateTimeOffset]::new([System.IO.File]::GetLastWriteTimeUtc($path)).ToUnixTimeSeconds()
  $path, $kind, '', '', $link, $changed, (Get-BytesHash $bytes).ToLowerInvariant(), $content, '' -join '|'
}
`

// psFacts is factsScript.
const psFacts = psCommon + `
'now=' + [DateTimeOffset]::UtcNow.ToUnixTimeSeconds()
if ($PSVersionTable.PSVersion -ge [Version]'5.1') { 'tool=powershell-5.1' }
if (Test-File ([System.IO.Path]::Combine([Environment]::SystemDirectory, 'icacls.exe'))) { 'tool=icacls' }
$me = [System.Security.Principal.WindowsPrincipal]::new([System.Security.Principal.WindowsIdentity]::GetCurrent())
if ($me.IsInRole([System.Security.Principal.WindowsBuiltInRole]::Administrator)) { 'tool=administrator' }
'free=' + [long]([System.IO.DriveInfo]::new($argv[0].Substring(0, 1)).AvailableFreeSpace / 1024)
`

// psStarted is startedScript.
const psStarted = psCommon + `
$all = @(Get-Process -Name $argv[0] -ErrorAction SilentlyContinue | Sort-Object -Property StartTime)
if ($all.Count -eq 0) { 'absent'; return }
$start = $all[0].StartTime.ToUniversalTime().AddMilliseconds(50)
foreach ($path in @($argv | Select-Object -Skip 1)) {
  if ((Test-File $path) -and [System.IO.File]::GetLastWriteTimeUtc($path) -gt $start) { 'no'; return }
}
'yes'
`

// psBackup is backupScript.
const psBackup = psFence + `
foreach ($path in $items) {
  $kept = Get-Tree 'old' $path
  if ((Test-File $kept) -or -not (Test-File $path)) { continue }
  Assert-Holder
  New-Parent $kept
  Write-Whole $kept ([System.IO.File]::ReadAllBytes($path))
  'kept ' + $path
}
`

// psStage is stageScript: the trees come as lines of STAGE|PATH|CONTENT, and no
// key is made here.
const psStage = psFence + `
foreach ($stage in 'trusted', 'switched', 'retired') {
  $tree = [System.IO.Path]::Combine($RUN, $stage)
  if ([System.IO.Directory]::Exists($tree)) { [System.IO.Directory]::Delete($tree, $true) }
}
foreach ($line in $stdin.Split([char]10)) {
  if ($line -eq '') { continue }
  $part = $line.Split('|')
  $to = Get-Tree $part[0] $part[1]
  Assert-Holder
  New-Parent $to
  Write-Whole $to ([System.Convert]::FromBase64String($part[2]))
  'staged ' + $part[1] + ' (' + $part[0] + ')'
}
`

// psPlace is placeScript. Stage "renewed" moves away what the kubelet made, once;
// stage "back" brings it back.
const psPlace = psFence + `
foreach ($item in $items) {
  $stage, $path = Get-Parts $item
  Assert-Holder
  if ($stage -eq 'renewed') {
    $kept = Get-Tree 'old' $path
    if ((Test-File $kept) -or -not (Test-File $path)) { continue }
    New-Parent $kept
    [System.IO.File]::Move($path, $kept)
    'moved away ' + $path
    continue
  }
  if ($stage -eq 'back') {
    $kept = Get-Tree 'old' $path
    if (-not (Test-File $kept)) { continue }
    if (Test-File $path) { [System.IO.File]::Delete($path) }
    [System.IO.File]::Move($kept, $path)
    'brought back ' + $path
    continue
  }
  $from = Get-Tree $stage $path
  if (-not (Test-File $from)) { Stop-Step 1 ('there is no ' + $from) }
  $bytes = [System.IO.File]::ReadAllBytes($from)
  if ((Test-File $path) -and (Get-BytesHash ([System.IO.File]::ReadAllBytes($path))) -eq (Get-BytesHash $bytes)) { continue }
  Write-Whole $path $bytes
  'placed ' + $path + ' (' + $stage + ')'
}
`

// psPlaced is placedScript.
const psPlaced = psCommon + `
$RUN = $argv[0]
foreach ($item in @($argv | Select-Object -Skip 1)) {
  $stage, $path = Get-Parts $item
  $kept = Get-Tree 'old' $path
  if ($stage -eq 'renewed') {
    if ((Test-File $kept) -or -not (Test-File $path)) { continue }
    'no ' + $path
    return
  }
  if ($stage -eq 'back') {
    if (-not (Test-File $kept)) { continue }
    'no ' + $path
    return
  }
  $from = Get-Tree $stage $path
  if (-not (Test-File $from) -or -not (Test-File $path) -or (Get-BytesHash ([System.IO.File]::ReadAllBytes($from))) -ne (Get-BytesHash ([System.IO.File]::ReadAllBytes($path)))) {
    'no ' + $path
    return
  }
}
'yes'
`

// psRestart restarts services, given as PROCESS:SERVICE, one after the other, and
// waits until each runs with a new process. One may stop and start another meanwhile,
// so each is looked at again and again, and asked to stop once.
const psRestart = psFence + `
$began = [DateTime]::UtcNow
foreach ($item in $items) {
  $process, $service = Get-Parts $item
  Assert-Holder
  $until = [DateTime]::UtcNow.AddSeconds(240)
  $asked = $false
  $why = ''
  while ($true) {
    $state = [string](Get-Service -Name $service).Status
    $new = @(Get-Process -Name $process -ErrorAction SilentlyContinue | Where-Object { $_.StartTime.ToUniversalTime() -ge $began })
    if ($state -eq 'Running' -and $new.Count -gt 0) { break }
    if ([DateTime]::UtcNow -gt $until) { Stop-Step 1 ($service + ' did not come back: it is ' + $state + ' ' + $why) }
    try {
      if ($state -eq 'Running' -and -not $asked) {
        $asked = $true
        Stop-Service -Name $service -Force -NoWait
      }
      if ($state -eq 'Stopped') { Start-Service -Name $service }
    } catch { $why = $_.Exception.Message }
    Start-Sleep -Milliseconds 500
  }
  $service + ' restarted: process ' + $new[0].Id
}
`

// psLock is lockScript. The folder is closed to others before anything is in it; one
// that somebody else may write is not used, for anybody can make a folder in c:\.
const psLock = psWrite + `
function Protect-Folder([string]$dir) {
  if (-not [System.IO.Directory]::Exists($dir)) { [void][System.IO.Directory]::CreateDirectory($dir) }
  if ([System.IO.File]::GetAttributes($dir).HasFlag([System.IO.FileAttributes]::ReparsePoint)) { Stop-Step 1 ($dir + ' leads elsewhere') }
  $icacls = [System.IO.Path]::Combine([Environment]::SystemDirectory, 'icacls.exe')
  & $icacls $dir '/setowner' '*S-1-5-32-544' | Out-Null
  if ($LASTEXITCODE -ne 0) { Stop-Step 1 ('icacls cannot set the owner of ' + $dir) }
  & $icacls $dir '/inheritance:r' '/grant:r' '*S-1-5-18:(OI)(CI)F' '*S-1-5-32-544:(OI)(CI)F' | Out-Null
  if ($LASTEXITCODE -ne 0) { Stop-Step 1 ('icacls cannot close ' + $dir) }
  $rules = (Get-Acl -LiteralPath $dir).GetAccessRules($true, $true, [System.Security.Principal.SecurityIdentifier])
  foreach ($rule in $rules) {
    if (@('S-1-5-18', 'S-1-5-32-544') -notcontains $rule.IdentityReference.Value) { Stop-Step 1 ($dir + ' is open to ' + $rule.IdentityReference.Value) }
  }
}
$RUN = $argv[0]
$TOKEN = $argv[1]
$TAKE = $argv[2]
$WHO = $argv[3]
$base = [System.IO.Path]::GetDirectoryName($RUN)
Protect-Folder $base
$others = @(Get-ChildItem -LiteralPath $base -Directory | Where-Object { Test-File ([System.IO.Path]::Combine($_.FullName, 'holder')) })
foreach ($other in $others) {
  $holder = [System.IO.Path]::Combine($other.FullName, 'holder')
  $name = Get-Text ([System.IO.Path]::Combine($other.FullName, 'who'))
  if ((Get-Text $holder) -ceq $TOKEN -or $name -ceq $WHO) { continue }
  $age = [DateTime]::UtcNow.Subtract([System.IO.File]::GetLastWriteTimeUtc($holder)).TotalSeconds
  if ($TAKE -eq 'no' -and $age -lt 90) { 'held ' + $name; return }
}
Protect-Folder $RUN
Write-Whole ([System.IO.Path]::Combine($RUN, 'who')) ([System.Text.Encoding]::UTF8.GetBytes($WHO))
Write-Whole ([System.IO.Path]::Combine($RUN, 'holder')) ([System.Text.Encoding]::UTF8.GetBytes($TOKEN))
foreach ($other in $others) {
  if ($other.FullName -ne $RUN) { [System.IO.File]::Delete([System.IO.Path]::Combine($other.FullName, 'holder')) }
}
'taken'
`

// psRelease is releaseScript.
const psRelease = psCommon + `
$holder = [System.IO.Path]::Combine($argv[0], 'holder')
if ((Get-Text $holder) -ceq $argv[1]) {
  [System.IO.File]::Delete($holder)
  [System.IO.File]::Delete([System.IO.Path]::Combine($argv[0], 'who'))
}
`

// psClean is cleanScript. What a link leads to is not ours.
const psClean = psFence + `
foreach ($stage in 'trusted', 'switched', 'retired', 'old') {
  $tree = [System.IO.Path]::Combine($RUN, $stage)
  if (-not [System.IO.Directory]::Exists($tree)) { continue }
  foreach ($path in [System.IO.Directory]::GetFiles($tree, '*', [System.IO.SearchOption]::AllDirectories)) {
    if (-not [System.IO.File]::GetAttributes($path).HasFlag([System.IO.FileAttributes]::ReparsePoint)) {
      $stream = [System.IO.FileStream]::new($path, [System.IO.FileMode]::Open, [System.IO.FileAccess]::Write, [System.IO.FileShare]::None)
      try {
        $stream.Write([byte[]]::new($stream.Length), 0, $stream.Length)
        $stream.Flush($true)
      } finally { $stream.Dispose() }
    }
    [System.IO.File]::Delete($path)
  }
  [System.IO.Directory]::Delete($tree, $true)
}
[System.IO.File]::Delete([System.IO.Path]::Combine($RUN, 'holder'))
[System.IO.File]::Delete([System.IO.Path]::Combine($RUN, 'who'))
'cleaned up'
`
