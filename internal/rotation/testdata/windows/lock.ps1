
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
