
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

$RUN = $argv[0]
$TOKEN = $argv[1]
$items = @($argv | Select-Object -Skip 2)
function Assert-Holder {
  $holder = [System.IO.Path]::Combine($RUN, 'holder')
  if ((Get-Text $holder) -cne $TOKEN) { Stop-Step 75 'another runner has taken over this rotation' }
  [System.IO.File]::SetLastWriteTimeUtc($holder, [DateTime]::UtcNow)
}
Assert-Holder

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
